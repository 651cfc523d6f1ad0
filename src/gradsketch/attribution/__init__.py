"""Which training examples caused this output?"""
