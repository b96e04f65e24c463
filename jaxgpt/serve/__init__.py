"""The playground: runs that generate text in a browser, for a handful of people at once."""
