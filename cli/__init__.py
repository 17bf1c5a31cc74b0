"""`olora`: the command line."""
