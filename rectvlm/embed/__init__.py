"""Features of CTs as a file, and a linear probe of them."""
