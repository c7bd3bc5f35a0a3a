"""What all directories on disk share: atomic files, arrays of rows, moved pictures, damage."""
