"""The commands of `kangaroo`, a file for each kind."""
