"""The online side: looking features up and scoring, from the online store and a model artifact."""
