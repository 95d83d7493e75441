"""The CPU back end: emitters of LLVM IR (one algorithm per file) and the runtime that runs it."""
