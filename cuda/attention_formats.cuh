// What a pair of codecs stands for, as macros.
//
// KEY_CODEC and VALUE_CODEC are a family times ten plus the bits of a code; KEY_GROUP and VALUE_GROUP the numbers that
// share a scale: channels of a token, or in the family CHANNELS tokens of a channel. PAGE tokens are packed together.
#pragma once

#define IDENTITY 0  // numbers of the model's dtype
#define FP8 1       // e4m3 and a scale a token
#define TOKENS 2    // whole numbers; scales (and centres, below 8 bits) by token and group of channels
#define CHANNELS 3  // whole numbers; scales and centres by channel and group of tokens
#define TURBO 4     // rotated; a sign and one of a few magnitudes, a scale a token
#define EQROT 5     // rotated; whole numbers, a scale a token; keys without their channels' mean and spread

#define KEY_FAMILY (KEY_CODEC / 10)
#define VALUE_FAMILY (VALUE_CODEC / 10)
#define KEY_BITS (KEY_CODEC % 10)
#define VALUE_BITS (VALUE_CODEC % 10)
#define KEY_ROTATED (KEY_FAMILY >= TURBO)
#define VALUE_ROTATED (VALUE_FAMILY >= TURBO)
#define CENTRED(codec) ((codec) / 10 == CHANNELS || ((codec) / 10 == TOKENS && (codec) % 10 < 8))
#define HALF_STEP(codec) (CENTRED(codec) || (codec) / 10 == EQROT)  // a code c stands for c + 0.5
#define BY_GROUP(codec) ((codec) / 10 == TOKENS || (codec) / 10 == CHANNELS)
#define KEY_GROUPS (KEY_FAMILY == TOKENS ? HEAD_KEY / KEY_GROUP : 1)  // of channels
#define VALUE_GROUPS (VALUE_FAMILY == TOKENS ? HEAD_VALUE / VALUE_GROUP : 1)
#define ALONG_CHANNELS(codec) ((codec) / 10 <= FP8)  // values lie token by token, as keys do

// Magnitudes of TURBO, a byte each, and what one counts for: the largest is 127 units.
#define LEVELS_LOW(bits) ((bits) == 4 ? 0x2c1f1206u : (bits) == 3 ? 0x7f4f2d0eu : 0x7f26u)
#define LEVELS_HIGH(bits) ((bits) == 4 ? 0x7f604b3au : 0u)
#define LEVEL_UNIT(bits) (((bits) == 4 ? 2.7326f : (bits) == 3 ? 2.1520f : 1.5104f) / 127.0f)
