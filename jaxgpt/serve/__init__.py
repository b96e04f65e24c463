"""The playground: runs that write in a browser, for a handful of people at once."""
