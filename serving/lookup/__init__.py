"""What a home's online store and models answer: features, scores, recommendations, what is alike."""
