"""Small media to try things with. They are drawn and played by the code here, under the names of vLLM's samples."""
