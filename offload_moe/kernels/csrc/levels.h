/* The 4-bit tables as 8-bit integers. */
#ifndef OM_LEVELS_H
#define OM_LEVELS_H

/* NF4: value = level / unit, fitted to the 16 values by least squares, each weighted with its frequency in normal weights:
 * relative rms error 0.47%, against 0.59% with round(127 * value). Zero stays zero. */
#define OM_NF4_LEVELS -124, -86, -65, -49, -35, -23, -11, 0, 10, 20, 31, 42, 55, 70, 90, 124
#define OM_NF4_UNIT 124.11404726855135f

/* MXFP4 (E2M1): twice the value is an integer. */
#define OM_MXFP4_LEVELS 0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12
#define OM_MXFP4_UNIT 2.0f

#endif
