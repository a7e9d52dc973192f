"""From photos and prompts to masks: the predictor and what lies around it."""
