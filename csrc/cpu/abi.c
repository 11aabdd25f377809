/* Raised together with ABI in kernels/cpu.py whenever a signature changes: a library built before is then not called.
 */
int dsv4_abi(void) { return 2; }
