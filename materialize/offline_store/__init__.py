"""What `materialize.feast_offline`, the class that Feast finds in feature_store.yaml, is made of."""
