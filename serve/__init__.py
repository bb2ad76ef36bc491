"""The HTTP server. It imports only the public names of mmjax."""
