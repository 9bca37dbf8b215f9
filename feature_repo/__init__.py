"""What is registered with Feast. `feast apply` imports every module here: only definitions."""
