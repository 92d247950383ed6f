"""Files that are uploaded to teach with, and jobs of `kangaroo tune` that outlive the server."""
