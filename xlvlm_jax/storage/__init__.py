"""What all directories on disk share: whole files, arrays of rows, moved pictures, damage."""
