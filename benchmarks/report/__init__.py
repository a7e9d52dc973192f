"""Tables, pictures and documents from the raw records."""
