"""How kernels run: one plain function of a Schedule per compute and kind of machine."""
