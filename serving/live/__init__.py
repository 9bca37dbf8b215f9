"""What was pushed since the publish: behaviors, impressions and clicks, kept on disk and answered with."""
