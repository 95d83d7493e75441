"""The page of ``neocog explain``: a scene as data, the page around it, and a server."""
