"""TensorRT engines of a bundle: shapes, memory, building, and what is kept beside them."""
