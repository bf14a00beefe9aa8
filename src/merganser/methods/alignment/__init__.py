"""Methods that put hidden units and heads into one order before they average."""
