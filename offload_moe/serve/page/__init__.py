"""The page at `/`: one file, which the server's content security policy names by the hashes of its parts."""
