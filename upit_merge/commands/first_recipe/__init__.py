"""What lies in a folder, what a recipe for it would be made of, and its text: of `init`."""
