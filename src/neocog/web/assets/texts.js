// Every word of the page, in English and in Korean.

const plural = (n, one, many) => `${n.toLocaleString("en")} ${n === 1 ? one : many}`;
const times = (rows, cols) => (rows === cols ? `${rows}` : `${rows}×${cols}`);

/** Both numbers of a window where they differ: "3×3", "stride 2". */
function windowWords(box, words, usual) {
  const { rows, cols } = box;
  const found = [];
  if (rows.stride !== usual[0] || cols.stride !== usual[1]) found.push(words.stride(times(rows.stride, cols.stride)));
  if (rows.low !== rows.high || cols.low !== cols.high) {
    found.push(words.sides(rows.low, rows.high, cols.low, cols.high));
  } else if (rows.low || cols.low) found.push(words.padding(times(rows.low, cols.low)));
  if (rows.dilation > 1 || cols.dilation > 1) found.push(words.dilation(times(rows.dilation, cols.dilation)));
  if (rows.ceil) found.push(words.ceil);
  return found;
}

const EN = {
  look: "Look inside a network",
  in: "in", says: "The network says", isRight: "right", isWrong: "wrong, it is",
  network: "The network, from the picture to the answer", theme: "Light or dark", language: "한국어",
  conv: (box) => `conv ${box.rows.size}×${box.cols.size}`,
  pool: (box) => `${box.mode === "max" ? "max" : box.mode === "mean" ? "average" : box.mode} pool ${box.rows.size}×${box.cols.size}`,
  kinds: { image: "picture", norm: "batch norm", pad: "padding", add: "add", mul: "multiply", cat: "concatenate", flatten: "flatten" },
  linear: "fully connected", layer: (n) => `layer ${n}`,
  words: {
    stride: (s) => `stride ${s}`, padding: (p) => `padding ${p}`, dilation: (d) => `dilation ${d}`,
    sides: (t, b, l, r) => `padding top ${t}, bottom ${b}, left ${l}, right ${r}`, ceil: "rounded up",
    groups: (g) => `${g} groups`, uncounted: "padding not counted", divisor: (d) => `divisor ${d}`,
  },
  unknown: "neocog does not know this step; its result is shown as it is",
  from: "from", plus: "and",
  dead: (n) => `${plural(n, "channel is", "channels are")} zero everywhere`, deadShort: (n) => `${n} dead`,
  deadOne: "dead: zero everywhere for this picture",
  channels: "Channels", channel: (c, of) => `channel ${c} of ${of}`, showAll: (n) => `show all ${n}`,
  scale: "Colours", own: "each channel's own scale", shared: "one scale for all",
  step: "Step", result: "Feature map", hint: "Point at a pixel, or use the arrow keys; click to hold it, Esc to let go.",
  held: "held", 
  place: (c, y, x) => `channel ${c}, row ${y}, column ${x}`,
  at: (y, x) => `row ${y}, column ${x}`,
  sum: "Where this number comes from",
  inputChannel: (c) => `input channel ${c}`, adds: "adds", inputNumber: (c) => `input ${c}`,
  patch: "input window", kernel: "kernel", products: "products",
  paddingZero: "padding, counts as 0", paddingNever: "padding, never wins", paddingAdds: "padding, adds 0",
  hidden: (n) => `${plural(n, "more input channel", "more input channels")}`, showHidden: "show all of them", showFew: "show the largest few",
  bias: "bias", total: "sum", largest: "the largest wins", mean: (d) => `sum of the window / ${d}`,
  largestOf: "largest of the window", meanOf: "mean of the window",
  other: "from the other branch:", goThere: "go there", comesFrom: "is the value of",
  check: "Check", explained: "computed here", networks: "the network's own", steps: "computed again for this page", difference: "difference",
  ok: "the same", wrong: "NOT the same",
  missing: "The exact numbers of this layer are not in this file: it holds them for the layers marked ●.", serveBy: "To have all numbers, type",
  orLayers: "or name the layer with --layers, with a larger --budget.",
  exact: "exact numbers are in this page",
  facts: "About this layer", size: "output size", height: "height", width: "width",
  unused: (rows, cols) => [rows.length && plural(rows.length, "row", "rows"), cols.length && plural(cols.length, "column", "columns")].filter(Boolean).join(" and ") + " unused: no window reaches them",
  weights: "weights", weightsOf: (k, rest) => `${plural(k, "kernel", "kernels")} of ${rest}`, biases: "biases",
  dense: "if fully connected", noWeights: "none, channels kept", work: "multiply-adds",
  plan: "compiled as", kernels: "kernels", time: "time", share: (s) => `${s} of the peak`, sees: "each output sees", jump: (j) => `neighbours ${j} apart`,
  seesAll: "the whole picture", seesUnknown: "cannot be told", seesFlat: "a window each, positions gone",
  field: "What it sees of the picture", fieldOf: (y0, y1, x0, x1) => `rows ${y0} to ${y1}, columns ${x0} to ${x1}`,
  none: "nothing but padding",
  play: "Play", pause: "Pause", next: "Step on", back: "Step back", whole: "Whole map", speed: "Speed",
  trying: "Try another window", tryHint: "A copy of this step, computed in the page: the kernel is cut or grows by zeros around it.",
  kernelSize: "kernel", stride: "stride", padding: "padding", dilation: "dilation", reset: "as in the network",
  noFit: (f) => `The window does not fit: ${f}`, trySize: "size", was: "was",
  failed: "The network stops here", unreachable: "These numbers cannot be had: is the server still running?",
  scaleBy: "scale", shiftBy: "shift", allInputs: (n, of) => (n < of ? `the first ${n} of ${of} input channels` : `all ${of} input channels`),
  formula: "I input size, D dilation, K kernel size, S stride: floor((I − D·(K−1) − 1 + low + high)/S) + 1",
  moved: (c, y, x, v) => `channel ${c}, row ${y}, column ${x}: ${v}`,
  total_: (weights, work, ms) => [`${weights} weights`, `${work} multiply-adds`, ms && `${ms} ms`].filter(Boolean).join(" · "),
  list: (n) => `the ${n} products that weigh most`,
};

const KO = {
  look: "신경망 들여다보기",
  in: "·", says: "신경망의 예측", isRight: "맞음", isWrong: "틀림 · 정답:",
  network: "이미지에서 예측까지, 신경망 전체", theme: "밝은/어두운 테마", language: "English",
  conv: (box) => `합성곱 ${box.rows.size}×${box.cols.size}`,
  pool: (box) => `${box.mode === "max" ? "최대" : box.mode === "mean" ? "평균" : box.mode} 풀링 ${box.rows.size}×${box.cols.size}`,
  kinds: { image: "이미지", norm: "배치 정규화", pad: "패딩", add: "더하기", mul: "곱하기", cat: "이어 붙이기", flatten: "평탄화" },
  linear: "완전 연결", layer: (n) => `${n}번 층`,
  words: {
    stride: (s) => `스트라이드 ${s}`, padding: (p) => `패딩 ${p}`, dilation: (d) => `딜레이션 ${d}`,
    sides: (t, b, l, r) => `패딩 위 ${t}, 아래 ${b}, 왼쪽 ${l}, 오른쪽 ${r}`, ceil: "올림",
    groups: (g) => `그룹 ${g}개`, uncounted: "패딩은 세지 않음", divisor: (d) => `제수 ${d}`,
  },
  unknown: "neocog가 모르는 단계입니다. 결과만 그대로 보여 줍니다",
  from: "입력:", plus: "함께 입력:",
  dead: (n) => `채널 ${n}개의 값이 모두 0입니다`, deadShort: (n) => `죽은 채널 ${n}개`,
  deadOne: "죽은 채널: 이 이미지에서는 값이 모두 0",
  channels: "채널", channel: (c, of) => `채널 ${c} / ${of}`, showAll: (n) => `${n}개 모두 보기`,
  scale: "색 기준", own: "채널마다 따로", shared: "모든 채널에 같은 기준",
  step: "단계", result: "특징 맵", hint: "픽셀을 가리키거나 화살표 키를 쓰세요. 클릭하면 고정되고 Esc로 풀립니다.",
  held: "고정됨", 
  place: (c, y, x) => `채널 ${c}, ${y}행 ${x}열`,
  at: (y, x) => `${y}행 ${x}열`,
  sum: "이 숫자는 어디에서 왔을까",
  inputChannel: (c) => `입력 채널 ${c}`, adds: "더하는 값", inputNumber: (c) => `입력 ${c}`,
  patch: "입력 영역", kernel: "커널", products: "곱",
  paddingZero: "패딩, 0으로 계산", paddingNever: "패딩, 선택되지 않음", paddingAdds: "패딩, 0을 더함",
  hidden: (n) => `나머지 입력 채널 ${n}개`, showHidden: "모두 보기", showFew: "큰 것만 보기",
  bias: "편향", total: "합", largest: "가장 큰 값이 선택됩니다", mean: (d) => `윈도 합 / ${d}`,
  largestOf: "윈도에서 가장 큰 값", meanOf: "윈도의 평균",
  other: "다른 분기에서:", goThere: "그곳으로", comesFrom: "다음 값과 같음:",
  check: "확인", explained: "여기서 계산한 값", networks: "신경망의 값", steps: "이 페이지를 위해 다시 계산한 값", difference: "차이",
  ok: "같음", wrong: "다름",
  missing: "이 층의 정확한 값은 이 파일에 없습니다. ● 표시가 있는 층의 값만 들어 있습니다.", serveBy: "모든 값을 보려면",
  orLayers: "또는 --layers로 층을 고르고 --budget을 늘리세요.",
  exact: "정확한 값이 이 페이지에 있음",
  facts: "이 층의 정보", size: "출력 크기", height: "높이", width: "너비",
  unused: (rows, cols) => [rows.length && `행 ${rows.length}개`, cols.length && `열 ${cols.length}개`].filter(Boolean).join("와 ") + "는 어느 윈도에도 들어가지 않아 쓰이지 않음",
  weights: "가중치", weightsOf: (k, rest) => `${rest} 커널 ${k}개`, biases: "편향",
  dense: "완전 연결이라면", noWeights: "없음, 채널 수 그대로", work: "곱셈-누산(MAC)",
  plan: "컴파일된 형태", kernels: "커널 이름", time: "시간", share: (s) => `최고 속도의 ${s}`, sees: "출력 하나의 수용 영역", jump: (j) => `이웃 출력 간격 ${j}`,
  seesAll: "이미지 전체", seesUnknown: "알 수 없음", seesFlat: "각각 한 영역만 봄, 위치 정보 없음",
  field: "수용 영역 (이미지에서 보는 범위)", fieldOf: (y0, y1, x0, x1) => `${y0}~${y1}행, ${x0}~${x1}열`,
  none: "패딩뿐",
  play: "재생", pause: "일시 정지", next: "한 칸 앞으로", back: "한 칸 뒤로", whole: "전체 맵", speed: "속도",
  trying: "커널 설정 바꿔 보기", tryHint: "이 단계의 사본을 페이지에서 계산합니다. 커널은 잘리거나 둘레에 0이 붙습니다.",
  kernelSize: "커널", stride: "스트라이드", padding: "패딩", dilation: "딜레이션", reset: "원래대로",
  noFit: (f) => `윈도가 입력보다 큽니다: ${f}`, trySize: "크기", was: "원래",
  failed: "신경망이 여기서 멈춥니다", unreachable: "값을 가져올 수 없습니다. 서버가 아직 켜져 있나요?",
  scaleBy: "배율", shiftBy: "이동", allInputs: (n, of) => (n < of ? `입력 채널 ${of}개 중 처음 ${n}개` : `입력 채널 ${of}개 모두`),
  formula: "I 입력 크기, D 딜레이션, K 커널 크기, S 스트라이드: floor((I − D·(K−1) − 1 + low + high)/S) + 1",
  moved: (c, y, x, v) => `채널 ${c}, ${y}행 ${x}열: ${v}`,
  total_: (weights, work, ms) => [`가중치 ${weights}`, `곱셈-누산 ${work}`, ms && `${ms} ms`].filter(Boolean).join(" · "),
  list: (n) => `가장 큰 곱 ${n}개`,
};

export const LANGUAGES = { en: EN, ko: KO };

/** What a layer is called: its own name, or its number where the name is one too ("0"). */
export function label(box, t) {
  if (box.kind === "image" && box.index === 0) return t.kinds.image;
  return box.layer !== null && /^\d+$/.test(box.name) ? t.layer(box.layer) : box.name;
}

/** A box in a word or two: "conv 3×3", "relu". */
export function title(box, t) {
  if (box.kind === "conv" || box.kind === "pool") return t[box.kind](box);
  if (box.kind === "act") return box.act;
  if (box.kind === "linear") return t.linear;
  return t.kinds[box.kind] ?? box.what;
}

/** What is special about the window of a box: ["stride 2", "padding 1"]. */
export function details(box, t) {
  if (box.kind !== "conv" && box.kind !== "pool") return [];
  const usual = box.kind === "pool" ? [box.rows.size, box.cols.size] : [1, 1];
  const found = windowWords(box, t.words, usual);
  if (box.groups > 1) found.push(t.words.groups(box.groups));
  if (box.kind === "pool" && !box.countPadding) found.push(t.words.uncounted);
  if (box.divisor) found.push(t.words.divisor(box.divisor));
  return found;
}

/** Channels x height x width, or the length of a vector. */
export const shapeText = (shape) => shape.join("×");
