"""How people touch Kangaroo: the command line and the pages in the browser."""
