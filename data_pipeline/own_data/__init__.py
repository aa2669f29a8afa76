"""Cases of the user's own data: a table of them, or a function that lists them."""
