/* The 4-bit tables as 8-bit integers, and the dynamic map as straight pieces. */
#ifndef OM_LEVELS_H
#define OM_LEVELS_H

/* NF4: value = level / unit, fitted to the 16 values by least squares, each weighted with its frequency in normal weights:
 * relative rms error 0.47%, against 0.59% with round(127 * value). Zero stays zero. */
#define OM_NF4_LEVELS -124, -86, -65, -49, -35, -23, -11, 0, 10, 20, 31, 42, 55, 70, 90, 124
#define OM_NF4_UNIT 124.11404726855135f

/* MXFP4 (E2M1): twice the value is an integer. */
#define OM_MXFP4_LEVELS 0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12
#define OM_MXFP4_UNIT 2.0f

/* IQ4_NL and IQ4_XS of GGUF: value = level. */
#define OM_IQ4_LEVELS -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113

/* bitsandbytes' dynamic map is odd around entry 127, but for its last entry. At distance d from there, from 2^k on, its size
 * is start + step * d, to 2.8e-7 of it. Piece 0 holds 0 and 1; piece 7 is the last entry, 1. */
#define OM_MAP_START_0 0.0f
#define OM_MAP_STEP_0 0x1.27476ep-21f
#define OM_MAP_STARTS_DOWN 1.0f, -0x1.95fff8p-1f, -0x1.41eb86p-4f, -0x1.f9db22p-8f, -0x1.85f070p-11f, -0x1.205bbap-14f, -0x1.81e03cp-18f, OM_MAP_START_0
#define OM_MAP_STEPS_DOWN 0.0f, 0x1.ccccc6p-7f, 0x1.70a3d8p-9f, 0x1.26e978p-11f, 0x1.d7dbf6p-14f, 0x1.797cbep-16f, 0x1.2dfd68p-18f, OM_MAP_STEP_0
#define OM_MAP_STARTS_UP OM_MAP_START_0, -0x1.81e03cp-18f, -0x1.205bbap-14f, -0x1.85f070p-11f, -0x1.f9db22p-8f, -0x1.41eb86p-4f, -0x1.95fff8p-1f, 1.0f
#define OM_MAP_STEPS_UP OM_MAP_STEP_0, 0x1.2dfd68p-18f, 0x1.797cbep-16f, 0x1.d7dbf6p-14f, 0x1.26e978p-11f, 0x1.70a3d8p-9f, 0x1.ccccc6p-7f, 0.0f

#endif
