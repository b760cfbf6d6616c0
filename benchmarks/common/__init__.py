"""What several scripts need: arguments, runs on file, pictures, judgement, measurement."""
