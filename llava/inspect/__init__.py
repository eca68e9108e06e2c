"""Looking at what is there before anything is trained."""
