// A drawing as lines, in units of its own size, and as the few pixels that a model takes.
//
//   rasterise([[[0.2, 0.5], [0.8, 0.5]]], { width: 8, height: 8, isDarkOnLight: false, fits: true })

const PEN = 0.11;
const FINER = 8;

// Paints lines over `size` pixels a unit, moved by `left` and `top` pixels.
export function paint(context, strokes, { size, left = 0, top = 0, pen = PEN * size, color }) {
  context.strokeStyle = color;
  context.lineWidth = pen;
  context.lineCap = context.lineJoin = "round";
  for (const stroke of strokes) {
    context.beginPath();
    for (const [x, y] of stroke) context.lineTo(left + x * size, top + y * size);
    // A dot is a line to itself.
    const [x, y] = stroke[0];
    if (stroke.length === 1) context.lineTo(left + x * size + 0.01, top + y * size);
    context.stroke();
  }
}

// Grey values, row by row: painted finer, then averaged over each pixel.
export function rasterise(strokes, { width, height, isDarkOnLight, fits }) {
  const canvas = new OffscreenCanvas(width * FINER, height * FINER);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.fillStyle = "black";
  context.fillRect(0, 0, canvas.width, canvas.height);
  paint(context, strokes, { ...placement(strokes, canvas, fits), color: "white" });
  const fine = context.getImageData(0, 0, canvas.width, canvas.height).data;
  const values = new Float64Array(width * height);
  for (let y = 0; y < canvas.height; y += 1) {
    for (let x = 0; x < canvas.width; x += 1) {
      const pixel = Math.floor(y / FINER) * width + Math.floor(x / FINER);
      values[pixel] += fine[4 * (y * canvas.width + x)] / FINER ** 2;
    }
  }
  return Uint8ClampedArray.from(values, (value) => (isDarkOnLight ? 255 - value : value));
}

// As a picture of exactly these pixels.
export function toPicture(values, { width, height }, canvas) {
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const image = context.createImageData(width, height);
  values.forEach((value, pixel) => image.data.set([value, value, value, 255], 4 * pixel));
  context.putImageData(image, 0, 0);
  return canvas;
}

function placement(strokes, { width, height }, fits) {
  const side = Math.min(width, height);
  const points = strokes.flat();
  if (!fits || !points.length) {
    return { size: side, left: (width - side) / 2, top: (height - side) / 2 };
  }
  const pen = PEN * side;
  const [low, high] = [Math.min, Math.max].map((pick) => [0, 1].map(
    (axis) => points.reduce((found, point) => pick(found, point[axis]), points[0][axis]),
  ));
  const extent = Math.max(high[0] - low[0], high[1] - low[1]);
  // A dot stays as small as it was drawn.
  const size = Math.min((side - pen) / Math.max(extent, 1e-9), 3 * side);
  return {
    size,
    pen,
    left: width / 2 - (size * (low[0] + high[0])) / 2,
    top: height / 2 - (size * (low[1] + high[1])) / 2,
  };
}
