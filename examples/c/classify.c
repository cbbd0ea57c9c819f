/* Classify a picture: classify MEAN STD PICTURE.ppm
 *
 * Reads a binary PPM (colour) or PGM (grey) picture, brings it to the size that the model takes,
 * computes (value - MEAN) / STD for bytes of 0 to 255 and prints the five best classes. The model
 * takes float32 [1, channels, height, width], and gives one score a class; MODEL_... come from
 * model.h, which mpqc compile writes beside the library. */
#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include "model.h"

#define CLASSES MPQC_OUTPUT_0_ELEMENTS
static const int shape[] = MPQC_INPUT_0_SHAPE;
static float input[MPQC_INPUT_0_ELEMENTS], scores[CLASSES];

static void fail(const char* why) {
  fprintf(stderr, "classify: %s\n", why);
  exit(2);
}

/* A number of the picture's header; comments go from # to the end of the line. */
static int number(FILE* file) {
  int c = fgetc(file), value = 0;
  while (isspace(c) || c == '#') {
    while (c == '#' && (c = fgetc(file)) != '\n' && c != EOF) c = '#';
    c = fgetc(file);
  }
  if (!isdigit(c)) fail("not a PPM or PGM picture");
  for (; isdigit(c); c = fgetc(file))
    if ((value = value * 10 + c - '0') > 16384) fail("the picture is too large");
  return value;
}

/* Pixels, row by row; 3 channels for PPM, 1 for PGM. */
static unsigned char* read_picture(const char* path, int* width, int* height, int* channels) {
  FILE* file = fopen(path, "rb");
  if (!file) fail("cannot open the picture");
  int p = fgetc(file), kind = fgetc(file);
  if (p != 'P' || (kind != '5' && kind != '6')) fail("not a binary PPM or PGM picture");
  *width = number(file), *height = number(file), *channels = kind == '6' ? 3 : 1;
  if (number(file) != 255 || !*width || !*height) fail("only pictures of 8 bits a channel");
  size_t bytes = (size_t)*width * (size_t)*height * (size_t)*channels;
  unsigned char* pixels = malloc(bytes);
  if (!pixels || fread(pixels, 1, bytes, file) != bytes) fail("the picture is cut off");
  fclose(file);
  return pixels;
}

/* Nearest pixel, channels first; grey pictures fill all channels, a grey model takes the mean. */
static void fill_input(const unsigned char* pixels, int w, int h, int n, float mean, float std) {
  float* out = input;
  for (int c = 0; c < shape[1]; c++)
    for (int y = 0; y < shape[2]; y++)
      for (int x = 0; x < shape[3]; x++) {
        const unsigned char* pixel = pixels + ((size_t)(y * h / shape[2]) * w + x * w / shape[3]) * n;
        float value = pixel[n == 1 ? 0 : c % 3];
        if (n == 3 && shape[1] == 1) value = (pixel[0] + pixel[1] + pixel[2]) / 3.0f;
        *out++ = (value - mean) / std;
      }
}

int main(int count, char** words) {
  if (count != 4) fail("usage: classify MEAN STD PICTURE.ppm");
  if (MPQC_INPUT_0_RANK != 4) fail("the model does not take pictures");
  int width, height, channels;
  unsigned char* pixels = read_picture(words[3], &width, &height, &channels);
  fill_input(pixels, width, height, channels, strtof(words[1], NULL), strtof(words[2], NULL));
  free(pixels);

  mpqc_model* model;
  int status = mpqc_create(1, &model);
  if (status) fail(mpqc_message(status));
  const void* inputs[] = {input};
  void* outputs[] = {scores};
  size_t input_sizes[] = {sizeof input}, output_sizes[] = {sizeof scores};
  status = mpqc_run(model, inputs, input_sizes, outputs, output_sizes);
  if (status) fail(mpqc_message(status));
  mpqc_destroy(model);

  for (int rank = 0; rank < 5 && rank < CLASSES; rank++) {
    int best = 0;
    for (int i = 1; i < CLASSES; i++)
      if (scores[i] > scores[best]) best = i;
    printf("class %d: %g\n", best, scores[best]);
    scores[best] = -1e30f;
  }
  return 0;
}
