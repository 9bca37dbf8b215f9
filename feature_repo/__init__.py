"""What is registered with Feast, and how a home's feature store is opened.

`feast apply` imports every module of this folder, so nothing else belongs here.
"""
