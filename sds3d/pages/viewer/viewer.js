// The 3D viewer of a run's page: draws the GLB that the page contains, with an orbit camera.
// Bundled with three.js (MIT, LICENSE-three) into viewer.min.js: npm install && npm run build
import {
  AmbientLight,
  Box3,
  DirectionalLight,
  PerspectiveCamera,
  Scene,
  Sphere,
  Vector3,
  WebGLRenderer,
} from "three";
import { OrbitControls } from "three/addons/controls/OrbitControls.js";
import { GLTFLoader } from "three/addons/loaders/GLTFLoader.js";

const FIELD = 35; // degrees
const FRONT = new Vector3(0.35, 0.35, 1).normalize(); // the front is +z, y is up; a little from above and the side

// Show a GLB (base64) in an element. The loop below sets its data-state to ready or failed.
async function show(place, base64) {
  const scene = new Scene();
  const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
  const model = (await new GLTFLoader().parseAsync(bytes.buffer, "")).scene;
  scene.add(model);

  const renderer = new WebGLRenderer({ antialias: true, alpha: true }); // sRGB output without tone mapping keeps the colours
  place.replaceChildren(renderer.domElement);
  const camera = new PerspectiveCamera(FIELD, 1, 0.01, 100);
  const lamp = new DirectionalLight(0xffffff, 2.2); // lights materials that need light; moves with the camera
  camera.add(lamp);
  scene.add(camera, new AmbientLight(0xffffff, 1.4));

  const controls = new OrbitControls(camera, renderer.domElement);
  const draw = () => renderer.render(scene, camera);
  const ball = new Box3().setFromObject(model).getBoundingSphere(new Sphere());
  const reset = () => {
    const away = (1.05 * ball.radius) / Math.sin((FIELD * Math.PI) / 360);
    camera.position.copy(ball.center).addScaledVector(FRONT, away);
    controls.target.copy(ball.center);
    controls.minDistance = 0.3 * ball.radius;
    controls.maxDistance = 10 * away;
    controls.update();
    draw();
  };
  const fit = () => {
    renderer.setPixelRatio(window.devicePixelRatio);
    renderer.setSize(place.clientWidth, place.clientHeight);
    camera.aspect = place.clientWidth / place.clientHeight;
    camera.updateProjectionMatrix();
    draw();
  };
  controls.addEventListener("change", draw); // draw only when the camera moves
  renderer.domElement.addEventListener("dblclick", reset);
  new ResizeObserver(fit).observe(place);
  fit();
  reset();
}

for (const place of document.querySelectorAll("[data-glb]")) {
  const data = document.getElementById(place.dataset.glb).textContent;
  show(place, data).then(
    () => (place.dataset.state = "ready"),
    (error) => {
      place.dataset.state = "failed";
      place.textContent = `This browser cannot show the model in 3D (${error.message}).`;
    },
  );
}
