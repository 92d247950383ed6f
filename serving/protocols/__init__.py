"""What requests may say and what answers hold, a file for each endpoint."""
