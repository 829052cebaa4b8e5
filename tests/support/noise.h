/* Of the comparisons: numbers between -2 and 2 that are the same in each run. */
#include <stdlib.h>

static float noise(void) { return (float)(rand() % 2001 - 1000) / 500.0f; }
