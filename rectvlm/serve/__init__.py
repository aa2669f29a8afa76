"""The HTTP server: CTs are uploaded, predicted one after the other, and looked at in a browser."""
