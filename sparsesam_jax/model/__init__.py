"""SAM itself: image encoder, prompt encoder and mask decoder; no files, no command line."""
