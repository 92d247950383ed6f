"""The API, a route a file."""
