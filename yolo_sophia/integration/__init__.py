"""The only folder that imports ultralytics: patches, arguments, and the work done in its training loop."""
