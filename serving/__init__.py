"""What a running service answers: features, scores and recommendations, in Python and over HTTP."""
