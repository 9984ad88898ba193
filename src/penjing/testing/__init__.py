"""What authors of extensions test with: tiny networks of many families, and oracles for removed channels."""
