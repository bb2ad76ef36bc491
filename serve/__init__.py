"""The HTTP server's place in the house: it will speak the wire format and use nothing of mmjax but its public names."""
