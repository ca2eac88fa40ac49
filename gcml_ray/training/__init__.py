"""One site's work, or the server's, without any transport: trainers, their models, files and scores."""
