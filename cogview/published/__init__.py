"""CogView's released files: read without running what their pickles name, taken into a run, and written again."""
