"""Planning a larger run: what small ones say of it, what it costs, and how to launch it."""
