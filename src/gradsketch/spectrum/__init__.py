"""What does the loss surface look like?"""
