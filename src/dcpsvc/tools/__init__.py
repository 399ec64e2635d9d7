"""What the command line does, as functions that return values: listing, showing, verifying."""
