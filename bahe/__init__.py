"""From long logs of what people do, in words, to click predictions with a language model."""
